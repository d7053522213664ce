"""Model file formats of other projects, one module per format.

Every format module has the two functions below. `checkpoint.load_model` calls the `read` functions in turn until one of
them recognizes the file. `convert.py` calls the `write` function of the format that the user chooses.

    read(path, content, ema, overrides)

        Args:
            path: what the user gave: a file, or for diffusers a folder or a hub name.
            content: the loaded content of the file, a dict.
            ema: read the EMA weights if the file has them, otherwise the raw weights.
            overrides: the overrides of `checkpoint.load_model`, which `shapes.make_config` checks.

        Returns:
            The config (see checkpoint.py) and the state dict under this project's parameter names, or None if the
            content has another format.

        Raises:
            UserError: if the content has this format but is damaged, or contradicts the overrides.

    write(path, models, config)

        Args:
            path: the file or folder to create.
            models: "ema" maps to the model with the EMA weights, and "model" to the model with the raw weights. A
                format that holds one set of weights uses "ema".
            config: the config of the checkpoint that the models come from.

        Raises:
            UserError: if the format cannot represent the model.

To add a format, write a module with these two functions and add its `read` to `checkpoint.READERS`.

wan.py and expert_folder.py are for experts of any transformer, which have no checkpoints of this project. Their
functions take and return a `remix.Remix`.
"""
