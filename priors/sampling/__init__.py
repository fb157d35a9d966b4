"""What all samplers share: noise, guidance and filters, schedules, orders."""
