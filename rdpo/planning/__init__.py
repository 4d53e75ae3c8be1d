"""Before anything is spent: memory, communication, speed and cost of a job."""
