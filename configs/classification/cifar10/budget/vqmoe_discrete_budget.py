_base_ = 'vqmoe_budget.py'
model = dict(form='discrete')
