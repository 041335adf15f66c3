"""The options of a run: what they are, how each is read, and the files that they come from."""

from ratel.config.files import read_file, resolve
from ratel.config.readers import MOST_SEED, check_can_write, check_name, choice_reader, directories_reader, number_reader, optional
from ratel.config.table import (ADAPTERS, CLASSIFY, MASKED_LM, NEXT_TOKEN, TASKS, TOKENS, CommonOptions, TrainConfig, flag_of, option_of,
                                options_of, planned_options, varied)

__all__ = ["ADAPTERS", "CLASSIFY", "MASKED_LM", "MOST_SEED", "NEXT_TOKEN", "TASKS", "TOKENS", "CommonOptions", "TrainConfig", "check_can_write",
           "check_name", "choice_reader", "directories_reader", "flag_of", "number_reader", "option_of", "optional",
           "options_of", "planned_options", "read_file", "resolve", "varied"]
