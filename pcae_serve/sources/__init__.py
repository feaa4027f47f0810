"""Where models come from: a name of a model to a local folder.

    DIR, FILE                                   a local path; one that exists is never anything else
    hf://OWNER/NAME[@REVISION][/PATH]           a repository on the Hugging Face hub
    OWNER/NAME[@REVISION]                       the same, for checkpoints, if no such path exists

`names` parses, `needed_files` chooses the files, `hub` fetches them, `bundle_cache` keeps bundles,
and `locate` is what commands call. `huggingface_hub` is imported on first use: it is an extra.
"""
