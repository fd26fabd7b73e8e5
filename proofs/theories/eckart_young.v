(** Eckart–Young: the truncated SVD is the best approximation of given rank

    Claim.  Let X = U diag(s) V^T with orthonormal columns and s_1^2 >= s_2^2 >= …
    Then for every B of rank at most r,

      ||X - B||_F^2  >=  sum_(i > r) s_i^2  =  ||X - U diag(s_1..s_r, 0..) V^T||_F^2 .

    Assumptions.  The SVD is taken as data (its existence is not proved here), so
    the theorem speaks of the factors a program has computed, and holds over any
    ordered field.  Only the squares of s must be in decreasing order. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** Weights w_i in [0, 1] of total at most r collect at most the r largest of the
    decreasing a_i:  sum_(i > r) a_i <= sum_i a_i (1 - w_i). *)
Lemma top_weights (R : realFieldType) p r (a w : 'I_p -> R) :
    (forall i, 0 <= a i) -> (forall i j : 'I_p, (i <= j)%N -> a j <= a i) ->
    (forall i, 0 <= w i <= 1) -> \sum_i w i <= r%:R ->
  \sum_(i < p | (r <= i)%N) a i <= \sum_i a i * (1 - w i).
Proof.
move=> a0 dec w01 wr.
have [rp|pr] := ltnP r p; last first.
  have none (i : 'I_p) : (r <= i)%N = false.
    by apply/negbTE; rewrite -ltnNge (leq_trans (ltn_ord i)).
  rewrite (eq_bigl _ _ none) big_pred0_eq sumr_ge0 // => i _.
  by have /andP[_ w1] := w01 i; rewrite mulr_ge0 ?subr_ge0.
pose t := a (Ordinal rp).
rewrite [X in _ <= X](bigID (fun i : 'I_p => (r <= i)%N)) /= -subr_ge0.
rewrite addrAC -sumrB addrC.
have headE : t * (r%:R - \sum_(i < p | ~~ (r <= i)%N) w i)
    <= \sum_(i < p | ~~ (r <= i)%N) a i * (1 - w i).
  have -> : r%:R = \sum_(i < p | ~~ (r <= i)%N) (1 : R).
    rewrite (eq_bigl (fun i : 'I_p => (i < r)%N)) => [|i]; last by rewrite ltnNge.
    by rewrite -(big_ord_widen _ (fun=> 1) (ltnW rp)) sumr_const card_ord.
  rewrite -sumrB mulr_sumr ler_sum // => i; rewrite -ltnNge => ir.
  have /andP[_ w1] := w01 i; rewrite le_mul2r ?subr_ge0 //.
  exact: (dec i (Ordinal rp) (ltnW ir)).
have tailE : - (t * \sum_(i < p | (r <= i)%N) w i)
    <= \sum_(i < p | (r <= i)%N) (a i * (1 - w i) - a i).
  rewrite mulr_sumr -sumrN ler_sum // => i ri; rewrite mulrBr mulr1 addrAC subrr add0r.
  by have /andP[w0 _] := w01 i; rewrite le_opp le_mul2r ?dec.
apply: le_trans (le_add headE tailE).
rewrite -mulrBr mulr_ge0 ?a0 // -addrA -opprD subr_ge0 addrC.
by rewrite (bigID (fun i : 'I_p => (r <= i)%N)) in wr.
Qed.

Section EckartYoung.
Variables (R : realFieldType) (m n p : nat).
Variables (U : 'M[R]_(m, p)) (V : 'M[R]_(n, p)) (s : 'rV[R]_p).
Hypotheses (UU : U^T *m U = 1%:M) (VV : V^T *m V = 1%:M).
Hypothesis s_dec : forall i j : 'I_p, (i <= j)%N -> s 0 j ^+ 2 <= s 0 i ^+ 2.

(** U diag(t) V^T *)
Definition svd (t : 'rV[R]_p) : 'M[R]_(m, n) := U *m diag_mx t *m V^T.

(** The first r singular values, the others set to 0. *)
Definition trunc r : 'rV[R]_p := \row_i (if (i < r)%N then s 0 i else 0).

(** sum_(i > r) s_i^2  (indices from 0 in the code: i >= r). *)
Definition tail r : R := \sum_(i < p | (r <= i)%N) s 0 i ^+ 2.

(** ||Q U diag(t) V^T||^2 = sum_j t_j^2 ||(Q U)_j||^2 *)
Lemma frob_svd k (Q : 'M[R]_(k, m)) t :
  frob (Q *m svd t) = \sum_j t 0 j ^+ 2 * sqn (col j (Q *m U)).
Proof. by rewrite /svd -frob_diag !mulmxA frob_isomr. Qed.

(** The columns of U have norm 1. *)
Lemma sqn_col_U j : sqn (col j U) = 1.
Proof.
rewrite /sqn /dot !colE trmx_mul -mulmxA (mulmxA U^T) UU mul1mx trmx_delta.
by rewrite mul_delta_mx mxE !eqxx.
Qed.

(** No matrix of rank at most r is closer than the tail of the spectrum. *)
Theorem eckart_young_lower r (B : 'M[R]_(m, n)) :
  (\rank B <= r)%N -> tail r <= frob (svd s - B).
Proof.
move=> Br; pose Q := proj B; pose P := 1%:M - Q.
have Qt : Q^T = Q := proj_tr B; have QQ : Q *m Q = Q := proj_idem B.
have PB : P *m B = 0 by rewrite /P mulmxBl mul1mx proj_id subrr.
apply: le_trans (_ : frob (P *m (svd s - B)) <= _); last first.
  by rewrite (frob_split (svd s - B) Qt QQ) le_addr frob_ge0.
rewrite mulmxBr PB subr0 frob_svd.
pose w j := sqn (col j (Q *m U)).
have resE j : sqn (col j (P *m U)) = 1 - w j.
  rewrite -(sqn_col_U j) /w !sqn_frob (frob_split (col j U) Qt QQ).
  by rewrite !colE !mulmxA addrC addKr.
under eq_bigr do rewrite resE.
apply: top_weights => [i||i|]; rewrite ?sqr_ge0 //.
  by rewrite sqn_ge0 -subr_ge0 -resE sqn_ge0.
rewrite -frobE -frob_tr trmx_mul Qt (le_trans (frob_contract Q UU)) //.
by rewrite /frob Qt QQ /Q proj_trace ler_nat.
Qed.

(** The truncated SVD attains the tail. *)
Theorem eckart_young_attained r : frob (svd s - svd (trunc r)) = tail r.
Proof.
have -> : svd s - svd (trunc r) = svd (s - trunc r).
  by rewrite /svd linearB /= mulmxBr mulmxBl.
rewrite -[svd _]mul1mx frob_svd mul1mx /tail [RHS]big_mkcond.
apply: eq_bigr => j _; rewrite sqn_col_U mulr1 !mxE ltnNge.
by case: leqP => _; rewrite ?subr0 ?subrr ?expr0n.
Qed.

(** Projection on the first r columns of U: U_r U_r^T. *)
Definition top_proj r : 'M[R]_m := U *m pid_mx r *m U^T.

(** rank(U_r U_r^T) <= r *)
Lemma rank_top_proj r : (\rank (top_proj r) <= r)%N.
Proof.
rewrite (leq_trans (mxrankM_maxl _ _)) // (leq_trans (mxrankM_maxr _ _)) //.
by rewrite -pid_mx_minv rank_pid_mx ?geq_minl ?geq_minr.
Qed.

(** Truncating the SVD is projecting on the first r columns of U. *)
Lemma svd_trunc r : svd (trunc r) = top_proj r *m svd s.
Proof.
have dE : diag_mx (trunc r) = pid_mx r *m diag_mx s.
  apply/matrixP=> i j; rewrite mul_mx_diag !mxE -val_eqE /=.
  case: eqP => [/val_inj->|_]; last by rewrite mulr0n mul0r.
  by case: ltnP; rewrite ?mul1r ?mul0r.
by rewrite /svd dE /top_proj -!mulmxA (mulmxA U^T U) UU mul1mx.
Qed.
End EckartYoung.
