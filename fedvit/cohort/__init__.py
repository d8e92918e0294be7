"""Eligibility of clients, their conditions and connectivity, and the draw of a round's cohort."""
