"""`python -m proxy` is `llm-quota-proxy`."""

from proxy.cli import main

if __name__ == "__main__":
    main()
