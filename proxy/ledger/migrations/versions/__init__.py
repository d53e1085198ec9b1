"""One step for each release that changes the schema. A step only adds."""
