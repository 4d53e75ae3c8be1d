"""Files and folders, on the local disk or in an object store, and the committed folder of a stage."""
