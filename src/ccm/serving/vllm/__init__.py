"""Generation in vLLM over our memories.

    ccm                                            vLLM
    fold -> memory -> store  --- (tenant, session, version) --->  connector: load -> KV of a placeholder prefix
         prompt: m placeholders + input            -->            tokens

vLLM reads a memory as the keys and values of the first m tokens of a prompt. ``connector`` runs inside vLLM, and is
the only module here that needs it; ``reference`` is what both sides agree on; ``engine`` is for the server.
"""
