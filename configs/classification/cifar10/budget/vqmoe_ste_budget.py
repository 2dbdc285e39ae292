_base_ = 'vqmoe_budget.py'
model = dict(expert_input='ste')
