"""Stands before TensorFlow in containers of other frameworks, which have none in SageMaker.

The toolkit imports TensorFlow before it starts the script, wherever there is one, which takes some seconds.
"""

raise ImportError("this container has no TensorFlow")
