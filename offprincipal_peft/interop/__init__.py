"""Adapters in forms that need nothing of this package: a plain PEFT LoRA, a merged model."""

from .folders import ExportError, default_form
from .lora_export import LoraExport, export_lora
from .merged_export import MergedExport, export_merged

__all__ = ["ExportError", "LoraExport", "MergedExport", "default_form", "export_lora", "export_merged"]
