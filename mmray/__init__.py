"""mmray trains a model that fuses an image and a text into one prediction, and scores very large tables with it on Ray.

config      settings of a run, checked before anything starts
table       the row contract: columns in and out, statuses, reasons
source      where image bytes come from
preprocess  bytes and strings -> arrays
model       arrays -> one prediction
bundle      weights + vocabulary + settings, in one directory without pickles
predictor   bundle -> table in, table out: the only inference path
train | evaluate | score   the same steps on Ray
report      a run as one page
"""

__version__ = "0.1.0"
