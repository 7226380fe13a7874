"""What a captured call says about its parameters: one handler per torch function.

`HANDLERS` maps the function to its handler, or to a rewrite into calls that have handlers. A
handler describes nothing of a call it does not know, and the parameters of that call then
take the fallback.
"""

from __future__ import annotations

from fisherkern.fisher.forward.capture import Handlers
from fisherkern.fisher.layers import (
    activations,
    attention,
    convolution,
    dense,
    norms,
    recurrent,
)
from fisherkern.fisher.layers.grads import EmbeddingGrad, LinearGrad

HANDLERS: Handlers = {
    **dense.HANDLERS,
    **norms.HANDLERS,
    **convolution.HANDLERS,
    **attention.HANDLERS,
    **recurrent.HANDLERS,
    **activations.HANDLERS,
}

__all__ = ["HANDLERS", "EmbeddingGrad", "LinearGrad"]
