"""What callbacks of training frameworks drive: a monitor whose model and optimizer come later."""
