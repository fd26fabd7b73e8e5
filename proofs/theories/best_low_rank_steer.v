(** The best linear steer of rank r

    X (d x T): states at the site, Y (o x T): target shifts, one token per column.
    Let S0 be any least-squares steer and S0 X = U diag(s) V^T the SVD of its fit.

    Claim.  S_r = U_r U_r^T S0, with U_r the first r columns of U, has rank at most r,

      ||Y - S_r X||^2 = ||Y - S0 X||^2 + sum_(i > r) s_i^2 ,

    and no linear steer of rank at most r has a smaller misfit.

    Assumptions.  Those of eckart_young.v (SVD as data) and least_squares.v.

    Not said here.  Best on the tokens used for the fit, in squared error on the
    shift; nothing about held-out tokens or about the loss of the model. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics frobenius least_squares eckart_young.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section BestSteer.
Variables (R : realFieldType) (d o T : nat).
Variables (X : 'M[R]_(d, T)) (Y : 'M[R]_(o, T)).
Variable S0 : 'M[R]_(o, d).
Hypothesis S0_ls : least_squares X Y S0.
Variables (p : nat) (U : 'M[R]_(o, p)) (V : 'M[R]_(T, p)) (s : 'rV[R]_p).
Hypotheses (UU : U^T *m U = 1%:M) (VV : V^T *m V = 1%:M).
Hypothesis s_dec : forall i j : 'I_p, (i <= j)%N -> s 0 j ^+ 2 <= s 0 i ^+ 2.
Hypothesis fitted : S0 *m X = svd U V s.

(** S_r = U_r U_r^T S0 *)
Definition best_steer r := top_proj U r *m S0.

(** S_r has rank <= r, the stated misfit, and no rank-r steer does better. *)
Theorem best_low_rank_steer r :
  [/\ (\rank (best_steer r) <= r)%N,
      frob (Y - best_steer r *m X) = frob (Y - S0 *m X) + tail s r
    & forall S, (\rank S <= r)%N ->
        frob (Y - best_steer r *m X) <= frob (Y - S *m X)].
Proof.
have E : frob (Y - best_steer r *m X) = frob (Y - S0 *m X) + tail s r.
  rewrite (least_squares_split S0_ls) /best_steer -mulmxA fitted -svd_trunc //.
  by rewrite eckart_young_attained.
split=> // [|S Sr]; first by rewrite (leq_trans (mxrankM_maxl _ _)) // rank_top_proj.
rewrite E (least_squares_split S0_ls S) le_add2l fitted eckart_young_lower //.
by rewrite (leq_trans (mxrankM_maxl _ _)).
Qed.
End BestSteer.
