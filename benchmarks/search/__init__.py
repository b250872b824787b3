"""The search for the recipe: trials with predictions, run one after the other and gone on with after any end.

A trials file (``benchmarks/trials/<suite>.yaml``, :mod:`.trials`) names a base config, what each trial changes of it,
what that is expected to do, and the seeds. ``benchmarks/recipe.py run`` (:mod:`.runner`) gives every trial and seed a
process of its own (:mod:`.worker`), so that its memory is its own and nothing it does ends the queue. There the trial
is a run of the real trainer in ``runs/recipe/<suite>/<trial>-seed-<n>``, with checkpoints; a callback scores it ten
times on the way and measures what a step costs (:mod:`.measure`), and the averaged weights are scored at the end. The
process leaves one row in the folder, and the queue adds it to ``benchmarks/results/<device>/recipe/<suite>.jsonl``
(:mod:`.rows`).

Nothing else is remembered. What is to be done is what the trials file asks for and the results have no row of: a row
holds the settings that it was made with, so a trial whose settings have changed has no row any more, and a folder whose
settings are those of its trial holds a run that goes on from its newest checkpoint. A process whose queue is gone ends
itself. :mod:`.tables` and :mod:`.pictures` read the rows alone.
"""
