"""The shipped recipes, and what is checked of them."""

from launcher.check.command import GROUPS, WAYS

__all__ = ["SHIPPED"]

# compiling takes longer than all the rest: once is enough, and each by hand
QUICK = ",".join([*GROUPS[1:], *(way for way in WAYS if way != "compiled")])
SHIPPED = {"gpt": ("gpt", None), "classify, quickly": ("classify", QUICK), "finetune, quickly": ("finetune", QUICK)}
SHIPPED |= {"classify": ("classify", None), "finetune": ("finetune", None)}
