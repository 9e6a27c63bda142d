"""The benchmark of transfer methods: pairs × skills × methods × text × seeds, one record per run, tables of lift."""
