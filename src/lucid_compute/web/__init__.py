"""What every route needs and no subject owns: parts, lists, errors, request bodies."""
