"""eBPF without a compiler or libbpf: an assembler, bpf(2), BTF, and the programs that observe cells."""
