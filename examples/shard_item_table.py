"""An item table by rows over two processes: its Fisher, its ranks, and its folders.

    torchrun --standalone --nproc-per-node 2 examples/shard_item_table.py

Called by Python alone, it starts these processes by itself.
"""

import os
import subprocess
import sys

if "RANK" not in os.environ:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    sys.exit(subprocess.run([sys.executable, *words]).returncode)

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fisherkern as fk

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

data = fk.synthetic(300, 100)
torch.manual_seed(0)
other = fk.SASRec(data.num_items, max_len=20, dim=16, heads=2, layers=1)
fk.save_model(other, "model.dcp")
batches = data.loader(split="train", batch_size=64, max_len=20)

model = fk.load_model("model.dcp", mesh)  # each process reads its rows alone
fisher = fk.diag_fisher(model, batches, sampler="topk", k=30)
fisher["item_embedding.weight"]  # a DTensor, laid out as the table
fisher.save("model.fisher.dcp")  # each process writes its rows
report = fk.evaluate(model, data)

table = distribute_tensor(other.item_embedding.weight.detach(), mesh, [Shard(0)])
other.item_embedding.weight = torch.nn.Parameter(table)  # a model that is in memory

again = fk.evaluate(other, data)
if torch.distributed.get_rank() == 0:
    rows = fisher["item_embedding.weight"].to_local().shape[0]
    print(f"process 0 holds {rows} of {len(table)} rows; NDCG@10 {report['ndcg@10']:.4f}")
    assert dict(again) == dict(report)
# What lies over the processes goes before they part.
del model, other, table, fisher, mesh
torch.distributed.destroy_process_group()
