"""The four stages of a policy as neutral ONNX graphs, laid out from the spec alone.

Neutral: standard operators up to opset 20 and nodes of our own domain, each with a function body of standard
operators in the same file, so that any ONNX runtime can execute it. What a node becomes on a target is the business of
`export/lower`.
"""
