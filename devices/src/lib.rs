//! Device models. No KVM, no unsafe, no threads of their own.
#![forbid(unsafe_code)]
