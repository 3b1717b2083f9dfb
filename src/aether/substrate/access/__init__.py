"""Identity, tickets, policy, budgets."""
