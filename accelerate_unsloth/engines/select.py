"""
Select the engine of this process when imported: bind this rank's GPU, then import Unsloth if it is the engine.

Unsloth has to be imported before trl, transformers and peft, so every module that uses them imports this one first.
"""

import torch

from ..launch import command, notebook, process
from ..launch.topology import declare_cpu_launch, topology, uses_cpu
from ..plugin import UnslothPlugin
from ..reliability import failures
from ..reporting.verbosity import drop_what_users_cannot_act_on, quiet_other_ranks
from . import resolve, variables

failures.install()
declare_cpu_launch()  # again, because a notebook's kernel may have imported the package before the launch
process.end_with_launcher()
process.renew_rendezvous()
process.locate()
process.close_process_group_at_exit()
_plugin = UnslothPlugin()
_use_cpu = uses_cpu()

choice = resolve(_plugin.engine, torch.cuda.device_count(), _use_cpu)
quiet_other_ranks(_plugin)
drop_what_users_cannot_act_on()
if not _use_cpu:
    notebook.check_fork(torch.cuda.device_count())
    if choice.name == "unsloth":
        variables.check_unsloth_modes()
        variables.set_defaults(topology().node)
    process.bind_device()
    command.show(torch.cuda.device_count())

if choice.name == "unsloth":
    from .unsloth import LOADERS, FastLanguageModel, FastModel
else:
    from .reference import LOADERS, FastLanguageModel, FastModel
notebook.forbid_launch(choice.name)

__all__ = ["LOADERS", "FastLanguageModel", "FastModel", "choice"]
