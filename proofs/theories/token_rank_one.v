(** At one token a steer is a rank-one weight update

    Claim.  For an input u other than 0 and any steer D,

      W (u + D) = (W + (W D) u^T / ||u||^2) u ,

    and the update has rank at most 1.  Hence for one token any steer of the input of
    W_g and W_u is a rank-one update of both.

    Assumptions.  Any ordered field.

    Not said here.  The update depends on the token; for several tokens see
    mlp_in_steer.v.  A skip connection around W carries D as well and needs its own
    correction. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section RankOne.
Variables (R : realFieldType) (d n : nat).
Variables (W : 'M[R]_(n, d)) (u D : 'cV[R]_d).

(** (W D) u^T / ||u||^2 *)
Definition token_update : 'M[R]_(n, d) := (sqn u)^-1 *: (W *m D *m u^T).

(** W (u + D) = (W + update) u *)
Theorem token_rank_one : u != 0 -> W *m (u + D) = (W + token_update) *m u.
Proof.
move=> u0; rewrite mulmxDr mulmxDl -scalemxAl -mulmxA; congr (_ + _).
rewrite [u^T *m u]mx11_scalar mul_mx_scalar scalerA -/(dot u u) -/(sqn u).
by rewrite mulVf ?scale1r // sqn_eq0.
Qed.

(** Its rank is at most 1. *)
Theorem token_update_rank : (\rank token_update <= 1)%N.
Proof.
by rewrite /token_update scalemxAr (leq_trans (mxrankM_maxr _ _)) ?rank_leq_row.
Qed.
End RankOne.
