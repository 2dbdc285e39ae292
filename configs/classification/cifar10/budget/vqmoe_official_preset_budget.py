_base_ = 'vqmoe_budget.py'
model = dict(preset='official')
