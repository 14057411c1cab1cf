"""FoLoRA: fine-tune a language model with LoRA without losing what it already knew (arXiv 2606.00132).

The mathematics stands in ``moments``, ``pencil``, ``gate``, ``optimizer`` and ``meter``; a stage of the pipeline in the
module of its name; the command line in ``cli``.
"""
