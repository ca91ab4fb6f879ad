//! Rules of a program, checked after lowering.
