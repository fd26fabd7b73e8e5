"""Updates from PEFT adapters, live or on disk: the names that other rooms use."""

from equiv.update.adapter_files import from_directory as from_directory
from equiv.update.merging import from_model as from_model
from equiv.update.peft_names import base_of as base_of
from equiv.update.peft_names import clean as clean
from equiv.update.peft_names import has_adapters as has_adapters
from equiv.update.peft_names import is_own as is_own
from equiv.update.peft_names import is_peft as is_peft
