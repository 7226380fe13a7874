"""What a captured call says about its parameters: one rule per torch function.

`RULES` maps the function to its rule, or to its replacement by calls that have rules. A
rule describes nothing of a call it does not know, and the parameters of that call then
take the fallback.
"""

from __future__ import annotations

from fisherkern.fisher.capture import Rules
from fisherkern.fisher.rules import (
    activations,
    attention,
    convolution,
    dense,
    norms,
    recurrent,
)
from fisherkern.fisher.rules.uses import LinearWeight, Lookup

RULES: Rules = {
    **dense.RULES,
    **norms.RULES,
    **convolution.RULES,
    **attention.RULES,
    **recurrent.RULES,
    **activations.RULES,
}

__all__ = ["RULES", "LinearWeight", "Lookup"]
