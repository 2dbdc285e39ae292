_base_ = 'vqmoe_budget.py'
model = dict(num_codes=32)
