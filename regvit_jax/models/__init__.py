"""Vision Transformers with registers: configuration, module, the `Model` that users hold, and the names they come
under."""
