"""One pass per target: neutral stage graphs -> what the target's engine runs fast. No torch here."""
