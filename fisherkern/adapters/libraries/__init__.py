"""Kinds of models, known by what they have: no library is imported to recognise it."""

from fisherkern.adapters.libraries.base import Library, recognised, register
from fisherkern.adapters.libraries.hugging_face import HuggingFace
from fisherkern.adapters.libraries.meta import GenerativeRecommender
from fisherkern.adapters.libraries.plain import PlainModule
from fisherkern.adapters.libraries.pmixer import GSASRec, SASRecPyTorch
from fisherkern.adapters.libraries.recbole import RecBole
from fisherkern.adapters.libraries.rectools import RecTools
from fisherkern.adapters.libraries.replay import Bert4RecModel, SasRec, SasRecModel

__all__ = ["Library", "PlainModule", "recognised", "register"]

# Asked from the last to the first.
for _library in (
    HuggingFace(),
    GSASRec(),
    GenerativeRecommender(),
    SASRecPyTorch(),
    SasRec(),
    Bert4RecModel(),
    SasRecModel(),
    RecTools(),
    RecBole(),
):
    register(_library)
