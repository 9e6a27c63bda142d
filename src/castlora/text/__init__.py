"""Text: corpora, prompts and prompt formats, and chats in the templates of models."""
