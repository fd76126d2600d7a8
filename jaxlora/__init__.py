"""LoRA and QLoRA fine-tuning of language models in JAX."""

from jaxlora.adapters import new_adapter as new_adapter
from jaxlora.adapters import put_adapter as put_adapter
from jaxlora.adapters import stack_adapters as stack_adapters
from jaxlora.adapters import take_adapter as take_adapter
from jaxlora.config import LoraConfig as LoraConfig
from jaxlora.config import ModelConfig as ModelConfig
from jaxlora.config import QuantConfig as QuantConfig
from jaxlora.config import RopeConfig as RopeConfig
from jaxlora.language_model import LanguageModel as LanguageModel
from jaxlora.loader import FastLanguageModel as FastLanguageModel
from jaxlora.lora import add_adapters as add_adapters
from jaxlora.lora import partition as partition
from jaxlora.loss import causal_lm_loss as causal_lm_loss
from jaxlora.model import CausalLM as CausalLM
from jaxlora.quant import QuantizedArray as QuantizedArray
from jaxlora.sampling import SamplingParams as SamplingParams
from jaxlora.sft import SFTConfig as SFTConfig
from jaxlora.sft import SFTTrainer as SFTTrainer
from jaxlora.train import TrainState as TrainState
from jaxlora.train import make_train_step as make_train_step
from jaxlora.variables import BaseParam as BaseParam
from jaxlora.variables import LoraParam as LoraParam
from jaxlora.variables import TrainableParam as TrainableParam
from jaxlora.vocabulary import add_new_tokens as add_new_tokens

__version__ = "0.1.0.dev0"
