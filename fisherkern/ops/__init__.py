"""Ops on plain tensors: softmax over the catalogue, backward passes, squared-gradient sums.

Each op has one name: its file, its schema `fisherkern::<name>`, its test and its
benchmark; a trailing underscore means that it mutates its first argument.
"""

from fisherkern.ops.attention_backward import attention_backward
from fisherkern.ops.head_sqgrad import head_sqgrad_
from fisherkern.ops.layer_norm_backward import layer_norm_backward
from fisherkern.ops.lookup_square import LookupSegments, lookup_segments, lookup_square_
from fisherkern.ops.sample_distinct import sample_distinct
from fisherkern.ops.sample_items import sample_items
from fisherkern.ops.segment_outer_square import segment_outer_square_
from fisherkern.ops.softmax_lse import softmax_lse
from fisherkern.ops.softmax_moments import softmax_covariance, softmax_mean
from fisherkern.ops.softmax_sketch import softmax_sketch
from fisherkern.ops.softmax_topk import softmax_topk

__all__ = [
    "LookupSegments",
    "attention_backward",
    "head_sqgrad_",
    "layer_norm_backward",
    "lookup_segments",
    "lookup_square_",
    "sample_distinct",
    "sample_items",
    "segment_outer_square_",
    "softmax_covariance",
    "softmax_lse",
    "softmax_mean",
    "softmax_sketch",
    "softmax_topk",
]
