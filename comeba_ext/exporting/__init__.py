"""Edited models for other programs: a folder that brings its gate, plain weights, a LoRA adapter (docs/exporting.md)."""

from comeba_ext.exporting.base import Exported
from comeba_ext.exporting.folder import export_folder
from comeba_ext.exporting.lora import export_lora
from comeba_ext.exporting.measured import measure
from comeba_ext.exporting.merged import export_merged

FORMATS = {"folder": export_folder, "merged": export_merged, "lora": export_lora}

__all__ = ["FORMATS", "Exported", "export_folder", "export_lora", "export_merged", "measure"]
