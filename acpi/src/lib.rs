//! ACPI tables and AML of a machine, as bytes. No I/O, no guest memory, no unsafe.
#![forbid(unsafe_code)]
