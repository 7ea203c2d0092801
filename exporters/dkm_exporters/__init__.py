"""Exporters: one package per target; each knows dkm_export and no other target."""
