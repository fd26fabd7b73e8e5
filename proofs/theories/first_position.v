(** Updates of W_q and W_k do nothing at the first position

    Under a causal mask the first token attends to itself alone, and a softmax over one
    score is 1 whatever the score is.
    Claims, exact.
      - softmax over one score is 1.
      - The output of a head at the first position does not depend on the score, hence
        not on W_q and W_k.

    Assumptions.  No attention sink outside the tokens, which would be a second score.

    Not said here.  Later positions do depend on W_q and W_k. *)
From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp Require Import Rstruct.
From Equiv Require Import basics real_numbers glu_exactness kl_bound.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** softmax over one score is 1. *)
Theorem softmax_of_one (z : 'I_1 -> R) i : softmax z i = 1.
Proof. by rewrite -(softmax_sum z) big_ord1 ord1. Qed.

(** Two scores at the first position, one output: W_o W_v x a, with a = softmax z. *)
Theorem first_position_ignores_scores d k o (Wo : 'M[R]_(o, k)) (Wv : 'M[R]_(k, d))
    (x : 'M[R]_(d, 1)) (z z' : 'I_1 -> R) :
  head Wo Wv x (\col_i softmax z i) = head Wo Wv x (\col_i softmax z' i).
Proof. by congr head; apply/colP=> i; rewrite !mxE !softmax_of_one. Qed.
