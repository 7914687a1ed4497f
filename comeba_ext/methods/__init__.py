"""Methods: how facts get into a model. One file a method, known by name; an :class:`~comeba_ext.Editor` has one.

    editor = Editor(model, tokenizer, method="MEMIT")     # settings: default_config("MEMIT", model)
    editor.collect_covariance(texts)
    editor.edit(requests); editor.rollback(0); editor.save_pretrained("edits")
    editor = Editor.from_pretrained(model, tokenizer, "edits")   # whichever method made them

:func:`register_method`, or the entry-point group ``comeba_ext.methods``, adds another one. None writes a base weight: what a method
would add to a weight is the ``delta`` of a hooked layer, which methods without hooks let through everywhere.
"""

from comeba_ext.methods.alphaedit import AlphaEdit, BetaEdit
from comeba_ext.methods.base import Method, Outcome
from comeba_ext.methods.comeba_hk import ComebaHK
from comeba_ext.methods.easyedit import read_easyedit
from comeba_ext.methods.emmet import EMMET
from comeba_ext.methods.fixed_threshold import FixedThreshold
from comeba_ext.methods.ft import FT, FTL
from comeba_ext.methods.grace import GRACE
from comeba_ext.methods.in_context import ICE, IKE
from comeba_ext.methods.kn import KN
from comeba_ext.methods.knowledge_editor import KnowledgeEditor
from comeba_ext.methods.lora import LoRA
from comeba_ext.methods.melo import MELO
from comeba_ext.methods.memit import MEMIT
from comeba_ext.methods.memoir import MEMOIR
from comeba_ext.methods.mend import MEND
from comeba_ext.methods.names import METHODS, method_named, method_names, register_method
from comeba_ext.methods.pmet import PMET
from comeba_ext.methods.r_rome import RROME
from comeba_ext.methods.rome import ROME
from comeba_ext.methods.serac import SERAC
from comeba_ext.methods.settings import default_config
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.methods.ultraedit import StableEdit, UltraEdit
from comeba_ext.methods.wise import WISE
from comeba_ext.methods.without_hooks import WithoutHooks

for _method in (
    ComebaHK,
    WithoutHooks,
    MEMIT,
    AlphaEdit,
    BetaEdit,
    ROME,
    RROME,
    EMMET,
    PMET,
    UltraEdit,
    StableEdit,
    FT,
    FTL,
    LoRA,
    GRACE,
    WISE,
    MEMOIR,
    MELO,
    KN,
    IKE,
    ICE,
    MEND,
    KnowledgeEditor,
    SERAC,
    FixedThreshold,
):
    register_method(_method)

__all__ = [
    "EMMET",
    "FT",
    "FTL",
    "GRACE",
    "ICE",
    "IKE",
    "KN",
    "MELO",
    "MEMIT",
    "MEMOIR",
    "MEND",
    "METHODS",
    "PMET",
    "ROME",
    "RROME",
    "SERAC",
    "WISE",
    "AlphaEdit",
    "BetaEdit",
    "ComebaHK",
    "FixedThreshold",
    "KnowledgeEditor",
    "LoRA",
    "Method",
    "Outcome",
    "Snapshots",
    "StableEdit",
    "UltraEdit",
    "WithoutHooks",
    "default_config",
    "method_named",
    "method_names",
    "read_easyedit",
    "register_method",
]
