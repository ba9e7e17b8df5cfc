"""The configuration. No torch and no DeepSpeed in here."""
