//! Policy files from the outside: the shipped ones, mistakes, privacy, and how explanations and the scheduler agree.
mod agreement;
mod files;
mod policies;
mod privacy;
mod random;
mod scheduling;
mod shipped;
