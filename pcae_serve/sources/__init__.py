"""Where models come from: a name of a model to a local folder.

    DIR, FILE                                   a local path; one that exists is never anything else
    hf://OWNER/NAME[@REVISION][/PATH]           a repository on the Hugging Face hub
    OWNER/NAME[@REVISION]                       the same, for checkpoints, if no such path exists
    https://…, s3://…, gs://…                   a folder or file in a store

`names` parses, `needed_files` chooses the files, `hub` and `stores` fetch them, `bundle_cache`
keeps bundles, and `locate` is what commands call. `huggingface_hub` and `fsspec` are imported on
first use: they are an extra.
"""
