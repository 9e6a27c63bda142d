"""What an adapter was trained to read with, where that is not its base model's tokenizer as it stands.

Who fine-tunes a base model for conversations gives it a chat template, often another token for the end, and sometimes
tokens that it did not have. All of this lies in the tokenizer beside the adapter; embeddings and output head that got
rows for such tokens lie whole among the adapter's weights.
"""

import copy
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from castlora.adapters.files import NEEDED_TOKENIZER_FILES, WEIGHTS_FILE
from castlora.errors import UserError, first_line
from castlora.models.loading import load_tokenizer, skeleton, vocabulary_size
from castlora.text.chat import TEMPLATE_FILE


def tokenizer_of(
    adapter: Path, of_base: PreTrainedTokenizerFast, base_config: PreTrainedConfig
) -> PreTrainedTokenizerFast:
    """The tokenizer in the adapter's folder, or where it holds none that of the base model.

    Where it has no chat template, it gets the one beside the adapter, or else the base model's.

    Args:
        adapter: its folder
        of_base: its base model's tokenizer, which stays as it is
        base_config: as `with_vocabulary_of` gives it

    Raises:
        UserError: tokenizer or template in the folder cannot be read, or the template writes tokens that are not in the
            model.
    """
    own = load_tokenizer(str(adapter)) if has_tokenizer(adapter) else copy.deepcopy(of_base)
    if own.chat_template is None:
        own.chat_template = _template_beside(adapter) or of_base.chat_template
    for token, index in own.get_added_vocab().items():
        if index >= vocabulary_size(base_config) and token in str(own.chat_template):
            raise UserError(
                f"The chat template in {str(adapter)!r} writes {token!r}, for which neither the adapter nor its base "
                "model has an embedding; name the model it was trained on with --source, or take another template."
            )
    return own


def has_tokenizer(adapter: Path) -> bool:
    """Whether a tokenizer lies in the adapter's folder, with the names of its special tokens."""
    return all((adapter / name).is_file() for name in NEEDED_TOKENIZER_FILES)


def with_vocabulary_of(adapter: Path, base_config: PreTrainedConfig) -> PreTrainedConfig:
    """The base model's configuration, with the number of tokens that the adapter was trained with.

    An adapter for more tokens than the base model has holds embeddings or output head whole. Without a tokenizer that
    says what they are it is taken for one of another base model, and the configuration stays as it is.

    Args:
        adapter: its folder
        base_config: of its base model
    """
    rows = _saved_rows(adapter, base_config) if has_tokenizer(adapter) else 0
    if rows <= vocabulary_size(base_config):
        return base_config
    extended = copy.deepcopy(base_config)
    extended.get_text_config().vocab_size = rows
    return extended


def resize_vocabulary(base: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Gives a base model the number of tokens that a configuration says; what is added the adapter brings along.

    Args:
        base: the base model, changed in place
        config: as `with_vocabulary_of` gives it
    """
    if vocabulary_size(base.config) != vocabulary_size(config):
        base.resize_token_embeddings(vocabulary_size(config), mean_resizing=False)


def _template_beside(adapter: Path) -> str | None:
    path = adapter / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({first_line(error)}); copy it again.") from error


def _saved_rows(adapter: Path, base_config: PreTrainedConfig) -> int:
    """How many rows the embeddings or the output head have that were saved with the adapter; 0 where none were."""
    base = skeleton(base_config)
    whole = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if id(module) in whole}
    try:
        with safe_open(adapter / WEIGHTS_FILE, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.offset_keys()}
    except (SafetensorError, OSError):
        # Whoever reads the weights says what is wrong with them.
        return 0
    for key, shape in shapes.items():
        parts = key.split(".")
        if names & set(parts) and parts[-1] == "weight" and "lora_" not in key and len(shape) == 2:
            return int(shape[0])
    return 0
