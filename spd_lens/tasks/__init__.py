"""Tasks with a known answer: toy data, its target model, and what a good decomposition of it shows. One file each."""
