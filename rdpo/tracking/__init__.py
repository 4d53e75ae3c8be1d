"""What a person, a program or a tracker hears of a run while it is made."""
