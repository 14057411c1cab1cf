#!/bin/sh
exec python -m pip install --editable .
