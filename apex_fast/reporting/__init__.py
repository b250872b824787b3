"""A run as one HTML page.

:mod:`~apex_fast.reporting.run_files` reads what a run left, :mod:`~apex_fast.reporting.curves` draws it as SVG,
:mod:`~apex_fast.reporting.page` puts everything into one file, :mod:`~apex_fast.reporting.command` is
``apex-fast report``.
"""
