"""The machine under the stages: which of them run, with what key, by which driver. It knows no room."""
